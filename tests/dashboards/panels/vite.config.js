// SPDX-FileCopyrightText: The sglang_weight_exporter authors
// SPDX-License-Identifier: Apache-2.0
import { defineConfig } from 'vite';

// PANELS_PORT: where this page is served; PANELS_PROMETHEUS: the Prometheus it asks, at /prom.
const server = {
  host: '127.0.0.1',
  port: Number(process.env.PANELS_PORT || 24001),
  strictPort: true,
  proxy: {
    '/prom': {
      target: process.env.PANELS_PROMETHEUS || 'http://127.0.0.1:24090',
      rewrite: (path) => path.replace(/^\/prom/, ''),
    },
  },
};

export default defineConfig({
  preview: server,
  resolve: {
    alias: { 'react-router-dom-v5-compat': 'react-router-dom' },
    dedupe: ['react', 'react-dom', 'rxjs', '@emotion/react', '@emotion/css'],
  },
  build: { chunkSizeWarningLimit: 99999 },
  define: { 'process.env.NODE_ENV': '"production"' },
});
