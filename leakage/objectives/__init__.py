"""What a search lowers: distances between gradients."""

from leakage.objectives.distances import DISTANCES, Gradients, cosine_distance, row_cosine_distance, squared_distance

__all__ = ["DISTANCES", "Gradients", "cosine_distance", "row_cosine_distance", "squared_distance"]
