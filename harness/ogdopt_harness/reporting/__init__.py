"""Tables, figures and pages of what the analysis found; loads no torch."""
