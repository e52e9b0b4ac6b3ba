"""What is in a GGUF file: its metadata, its tensors, and the model's shape they describe.

Pure: bytes in, frozen values out; only `read_header` opens files. It never trusts the file.
"""
