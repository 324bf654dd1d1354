"""Tickets, masks on random weights, composed fine-tunings and clusters, on scikit-learn's handwritten digits."""
