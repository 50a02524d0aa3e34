"""What is refused or warned of, by subject, before it costs anything."""
