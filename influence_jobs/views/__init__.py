"""What the views of all kinds of runs are made of: tables, figures, rankings."""
