// Where everything stands: a band per used row, a column per position, nodes side by side within their cell.
const data=read('data'),NS='http://www.w3.org/2000/svg',svg=$('svg'),panel=$('panel'),slider=$('threshold');
const GAP=22,LINE=20,MARGIN=190;
function el(parent,name,attributes,text){const e=document.createElementNS(NS,name);
for(const k in attributes)e.setAttribute(k,attributes[k]);if(text!==undefined)e.textContent=plainText(String(text));parent.append(e);return e}
const signed=v=>(v>0?'+':'')+number(v);
$('check').textContent=plainText(data.check);
const typed=labels(data.of);
const typedLabel=n=>n.kind==='subcomponent'?typed.get(n.site,n.id,n.given):'';
// What a node is called: what somebody typed, what came with the page, what the counts say, or its name.
const nameOf=n=>typedLabel(n)||n.auto||n.label;
const whole=n=>{const t=typedLabel(n)||n.auto;return t?n.label+': '+t:n.label};
const placed=n=>n.pos===null?'':` @${n.pos} ${shown(n.token)}`;

const used=[...new Set(data.nodes.map(n=>n.row))].sort((a,b)=>a-b),level=new Map(used.map((r,i)=>[r,i]));
const columns=Math.max(1,data.tokens.length,...data.nodes.map(n=>n.pos===null?1:n.pos+1)),cells=new Map();
data.nodes.forEach((n,i)=>{const key=n.row+' '+(n.pos||0);if(!cells.has(key))cells.set(key,[]);cells.get(key).push(i)});
// Readouts have text in them and stand above each other.
const perLine=ids=>data.nodes[ids[0]].kind==='readout'?1:12,wide=ids=>data.nodes[ids[0]].kind==='readout'?210:GAP;
const width=Array(columns).fill(44),lines=used.map(()=>1);
cells.forEach((ids,key)=>{const [row,c]=key.split(' ').map(Number),l=level.get(row);
width[c]=Math.max(width[c],Math.min(ids.length,perLine(ids))*wide(ids)+22);
lines[l]=Math.max(lines[l],Math.ceil(ids.length/perLine(ids)))});
const start=[];let total=0;for(const w of width){start.push(total);total+=w}
// Rows are as far apart as fills the window at the zoom that the width asks for.
const READOUT=2.6,extra=lines.map(n=>(n-1)*LINE*READOUT),more=extra.reduce((a,b)=>a+b,0);
const room=[Math.max(300,svg.clientWidth-MARGIN-20),Math.max(200,svg.clientHeight-120)];
const ROW=Math.min(200,Math.max(48,(room[1]/Math.min(1.6,room[0]/(total+12))-more)/Math.max(1,used.length)));
const height=extra.map(h=>h+ROW),bottom=[];let tall=0;
for(let i=used.length-1;i>=0;i--){bottom[i]=[tall,tall+height[i]/2];tall+=height[i]}
const at=data.nodes.map(()=>null);
cells.forEach((ids,key)=>{const [row,c]=key.split(' ').map(Number),n=perLine(ids),count=Math.ceil(ids.length/n);
ids.forEach((i,k)=>{const line=Math.floor(k/n),here=Math.min(n,ids.length-line*n);
at[i]=[start[c]+width[c]/2+(k%n-(here-1)/2)*wide(ids),bottom[level.get(row)][1]+(line-(count-1)/2)*LINE*(n===1?READOUT:1)]})});
const incoming=data.nodes.map(()=>[]),outgoing=data.nodes.map(()=>[]);
data.edges.forEach((e,i)=>{outgoing[e[0]].push(i);incoming[e[1]].push(i)});
