"""Heads on the Hub and in folders: text to folder, folder to Hub, JSON to card."""
