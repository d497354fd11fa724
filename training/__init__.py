"""How the bundled model was made: its data, its training, its packaging."""
