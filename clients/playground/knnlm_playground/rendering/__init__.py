"""What the page shows, as HTML: pure functions, in which everything that comes from outside is escaped by `Markup`."""
