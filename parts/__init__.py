"""What the scripts share, and what the documented example does not have; one subject a file.

Scripts import parts, parts never import scripts. What the readers of the data set script start
with (docstrings, public_objects) imports no MLX.

docstrings        a docstring made fit to learn from
public_objects    every public object of a package, under the name that a user types
"""
