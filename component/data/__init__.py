"""From text, conversations and documents to rows of token ids."""
