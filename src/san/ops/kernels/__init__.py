"""One folder per operator, its backends side by side, so that a listing of the folder is the support matrix."""
