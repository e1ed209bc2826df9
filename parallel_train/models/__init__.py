"""Built-in models, one file each: Linen modules called as `model(images, train=...)`."""
