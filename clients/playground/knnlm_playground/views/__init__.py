"""The page's tabs: components, and what happens when somebody uses them."""
