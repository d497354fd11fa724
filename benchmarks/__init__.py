"""What is measured about skyreels_fast, and how."""
