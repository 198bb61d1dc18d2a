// Clicks in what the page draws itself: a sample or weight group is a button, a pixel is a place in a picture.
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) {
    trigger("click", { ...button.dataset });
    return;
  }
  const picture = event.target.closest("svg[data-width]");
  if (picture) {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
    trigger("select", { x: place.x / picture.dataset.width, y: place.y / picture.dataset.height });
  }
});
