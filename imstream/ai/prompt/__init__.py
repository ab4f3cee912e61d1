"""The prompt of each AI call: templates, history that fits the context, summaries, special tokens."""
