"""What training does to images to make views of them: crops, flips, colours, blur."""
