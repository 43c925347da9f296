"""How good a model is: from its name to samples, features, figures and a file that says of what they are."""
