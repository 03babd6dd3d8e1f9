"""A model folder as answers: benchmarks item by item, prompts, judges behind an endpoint."""
