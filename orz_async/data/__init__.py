"""Problems become prompts.

consumes  files of problems (ORZ JSON or JSONL), a tokenizer directory, a prompt template
produces  `Prompt` records: tokens and reference answer, in a seeded endless order that is a pure function of its index
"""
