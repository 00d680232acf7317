"""`python -m fairseq_ext.speaker.export`: a trained model as a file that runs without torch."""
