"""One operation a file: its equation, a readable torch reference, a public function that picks by device."""
