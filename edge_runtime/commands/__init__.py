"""The commands that train and evaluate a bundle, each with `add_parser(subparsers)`."""
