"""The benchmark harness: full preference-tuning runs, and what they forget."""
