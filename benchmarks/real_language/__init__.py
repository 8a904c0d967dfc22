"""The parts of ``benchmarks/real_language.py``: studies, writers, the language model's training and writing, scores."""
