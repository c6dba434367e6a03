"""The student, its fusion and losses, and the frozen teacher: plain tensors in, plain tensors out."""
