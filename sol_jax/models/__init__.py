"""The frozen model: a Llama as pure functions, and its files.

`llama` is the maths.  `weights` finds and loads a model by name, with `hf_config`, `gguf_config` and
`config_fields` for its configuration; `tokenizer` and `chat_template` turn text into its tokens.
"""
