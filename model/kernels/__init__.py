"""One operation a file: its equation, a readable torch reference, and one public function that picks by device."""
