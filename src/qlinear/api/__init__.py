"""One file per public function; each function is one command."""
