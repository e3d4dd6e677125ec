"""What the words of the dashboard mean, a sentence each: tooltips, and a list below a page."""

from __future__ import annotations

WORDS = {
    "T_priv": "Accuracy on test images drawn like the device’s own classes: how well it does what it sees every day.",
    "T_uni": "Accuracy on test images of all classes alike: how well it does what only others have seen.",
    "Validation": "Accuracy of the global model on the task’s validation images, by which the best round is chosen: a "
    "task without test images has no T_uni of it.",
    "Together − alone": "How much better devices do in the federation than the same students trained on their own data "
    "alone, the mean over the devices that compare.",
    "Global model": "The coordinator’s own student, which it distils from what devices upload.",
    "Exchange": "What devices upload of the shared transfer images: latents, logits, both, or their parameters.",
    "Transfer set": "The shared images: devices get them without classes, and upload their outputs on them. Where the "
    "coordinator knows the classes, its global model learns them, too.",
    "Best round": "The one whose global model does best on the task’s validation images; it is kept. Test images never "
    "choose it.",
    "Mode": "Whether the coordinator distils a model of its own.",
    "Aggregation": "How the uploads of a round become one.",
    "Goal": "As many accepted uploads end a round; at its deadline the second number is enough.",
}
MODES = {
    "global": "global: the coordinator distils the uploads into a model of its own, and devices learn from that.",
    "consensus": "consensus: there is no model of the coordinator’s own; devices learn from the combined uploads.",
}
STATES = {
    "training": "is selected for the present round and has not uploaded yet",
    "uploading": "sends its upload now",
    "uploaded": "has uploaded, and waits for the others",
    "waiting": "asks for work, and waits for a round",
    "silent": "was not heard for longer than a device that waits keeps still",
    "done": "the task has ended",
    "revoked": "may not take part any more: the operator revoked it",
}
