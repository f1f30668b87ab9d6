"""Language models behind one protocol: the Hugging Face adapter, its key tap, slot cache and tokenizer."""
