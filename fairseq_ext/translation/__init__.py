"""Machine translation: from raw bitext to a scored Transformer."""
