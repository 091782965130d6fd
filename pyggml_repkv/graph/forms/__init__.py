"""The forms that a step is built of: a layout of activations, and the nodes that work on it."""
