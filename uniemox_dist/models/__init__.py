"""The student, its parts and losses, and the classifier. Modules take and return plain tensors."""
