// Browsers start no workers for pages that are opened from a folder. There, the worker of the search runs in a hidden
// frame. The theme would load such a script from another host.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.window = frame.contentWindow
      this.window.postMessage = data => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        this.onmessage?.(event)
      }
      this.window.importScripts = (...urls) => urls.reduce((ready, source) => ready.then(() => this.load(source)), Promise.resolve())
      this.ready = this.load(url)
    }

    load(source) {
      return new Promise((resolve, reject) => {
        const script = this.window.document.createElement("script")
        Object.assign(script, { src: source, onload: resolve, onerror: reject })
        this.window.document.body.append(script)
      })
    }

    postMessage(data) {
      this.ready.then(() => this.window.dispatchEvent(new MessageEvent("message", { data })))
    }

    terminate() {
      this.window.frameElement.remove()
    }
  }
}
