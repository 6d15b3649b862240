"""The DeepSeek-V4 model: its configuration, its arithmetic, its cost, and its Hugging Face form."""
