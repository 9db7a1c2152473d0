// Browsers start no workers for pages that are opened as files: the search works in a frame then.
// (Its name tells the plugin `offline` not to fetch such a script from elsewhere.)
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = `<script>
        self.postMessage = data => parent.dispatchEvent(new CustomEvent("of-frame", {detail: data}))
        self.importScripts = (...urls) => Promise.all(urls.map(src => new Promise(onload => {
          const script = document.createElement("script")
          document.head.append(Object.assign(script, {src, onload, async: false}))
        })))
      <\/script><script src="${url}"><\/script>`
      this.ready = new Promise(done => (frame.onload = () => done(frame.contentWindow)))
      addEventListener("of-frame", ({detail}) =>
        this.dispatchEvent(new MessageEvent("message", {data: detail})))
      document.body.append(frame)
    }

    postMessage(data) {
      this.ready.then(frame => frame.dispatchEvent(new MessageEvent("message", {data})))
    }
  }
}
