"""A model folder as answers: benchmarks item by item, prompts, judges at an endpoint."""
