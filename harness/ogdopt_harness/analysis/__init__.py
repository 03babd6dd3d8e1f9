"""What a study's results say; loads no torch."""
