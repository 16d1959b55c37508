"""Text that the model writes itself under a controller.

`episodes` is the maths of one episode, `sampling` and `lossless` choose tokens, `engine` answers requests in
batches, `load_engine` opens one by name, `transcript` is the text so far, `output_cost` what it took.
"""
