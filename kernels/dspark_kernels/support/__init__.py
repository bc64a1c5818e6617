"""What the ops share: errors, operand checks, the backend, compilation and traffic counting."""
