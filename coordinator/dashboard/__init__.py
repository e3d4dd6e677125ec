"""The dashboard, for people.

`routes`: HTTP. `pages`: HTML from templates. `views`: what a page shows of the store's records. `charts`: SVG.
`events`: server-sent events, by which an open page learns that something changed.
"""
