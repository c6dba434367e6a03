"""The frozen teacher, its caches of captions and views, and the replay of cached views."""
