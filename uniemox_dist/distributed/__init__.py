"""The processes of a run: this process's place among the ranks, collectives, and the launcher of local ranks."""
