"""What every experiment's report is made of: numbers from curves, tables as text and HTML, one self-contained page."""
