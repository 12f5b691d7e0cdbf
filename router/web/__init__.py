"""The web pages: a chat and an operator's page, as plain files, and a small server that shows them."""
