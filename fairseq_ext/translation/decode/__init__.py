"""From a checkpoint to translations: options, search, fairseq's and CTranslate2's engine."""
