"""Text: where it comes from, and blocks of tokens cut from it.

`documents` reads sources, `wikipedia` cleans the embedded one, `tfds_builder` cuts and caches blocks, and
`blocks` hands them out in batches that can be resumed.
"""
