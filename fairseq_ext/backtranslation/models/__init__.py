"""fairseq, Hugging Face Marian and CTranslate2 behind one interface."""
