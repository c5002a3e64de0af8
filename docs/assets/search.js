// "--max-objects" is an option, and not lunr's "without max": all words of the name are looked for.
const send = Worker.prototype.postMessage;
Worker.prototype.postMessage = function (message, ...rest) {
  if (message && typeof message.data === "string") {
    const query = message.data.replace(/(^|\s)--?([a-z][\w-]*)/gi, (match, space, name) =>
      `${space}${name.split("-").filter(Boolean).map((word) => `+${word}`).join(" ")}*`);
    message = { ...message, data: query };
  }
  return send.call(this, message, ...rest);
};
