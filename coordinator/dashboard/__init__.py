"""The dashboard, for people.

`routes`: HTTP. `pages`: HTML from templates. `views`: what a page shows of the store's records. `curves`: which
drawings a page has, `charts`: how they are drawn, as SVG. `tables`: CSV. `formats`, `words`: figures and terms for
people. `events`: server-sent events, by which an open page learns that something changed.
"""
