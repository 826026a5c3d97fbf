// The conversation is escaped for the page (chat.py, _turn); a copy is the text itself.
if (navigator.clipboard) {
  const write = navigator.clipboard.writeText.bind(navigator.clipboard);
  navigator.clipboard.writeText = (text) => write(text.replaceAll("&lt;", "<").replaceAll("&amp;", "&"));
}
