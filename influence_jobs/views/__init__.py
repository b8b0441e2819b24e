"""The building blocks of views of all kinds: tables, figures, rankings."""
